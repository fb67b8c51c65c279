//! Benchmarks of Forkling.
