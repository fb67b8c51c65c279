//! Probes: what this host offers.
