"""The services of ``docker/compose.yaml`` as plain processes of this machine, for a look and for tests."""
