"""Faults on purpose: processes really killed, disks really full, files really broken. `make test-faults`."""
