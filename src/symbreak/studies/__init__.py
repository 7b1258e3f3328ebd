"""Studies: where data, networks, phases, starts and metrics meet; each yields a `Record`."""
