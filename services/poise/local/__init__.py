"""Everything on one machine: processes, an embedded Valkey, models to try it with."""
