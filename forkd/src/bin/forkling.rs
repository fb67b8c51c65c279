//! The `forkling` program.

fn main() -> std::process::ExitCode {
    forkling_daemon::cli::main()
}
