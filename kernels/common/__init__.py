"""What the operations share: choice of backend, packed rows, statistics, the native library."""
