"""What the tests share: tiny models, faults, processes, and other libraries' adapters."""
