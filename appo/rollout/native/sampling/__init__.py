"""Drawing tokens by noise that depends on seed and position alone: definition and backends."""
