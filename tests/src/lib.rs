//! Harness of the promise tests.
