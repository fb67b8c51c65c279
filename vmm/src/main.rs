//! `forkling-vmm`: the process image of template builds, zygotes and forks.

fn main() {}
