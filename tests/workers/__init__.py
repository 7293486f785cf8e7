"""What runs in the processes of the tests of distributed training; see `tests/distributed.py`."""
