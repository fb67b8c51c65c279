//! The closed set of devices a guest has.
