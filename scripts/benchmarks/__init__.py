"""What `scripts/bench` measures: pxd beside its peers on this machine."""
