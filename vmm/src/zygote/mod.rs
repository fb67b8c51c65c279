//! The zygote process and the forks it makes.
