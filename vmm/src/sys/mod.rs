//! The only unsafe code of the crate: thin safe wrappers over kernel interfaces.
