//! A machine: VM, vCPUs and devices as one value with a typed life cycle.
