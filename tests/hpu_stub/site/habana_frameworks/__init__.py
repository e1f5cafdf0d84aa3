"""Stand-in: calls are noted in tests.hpu_stub.journal, the device is the host."""
