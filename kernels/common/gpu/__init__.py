"""What the Triton kernels share: launches, tiles per architecture, compilation ahead of time."""
