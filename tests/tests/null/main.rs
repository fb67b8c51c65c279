//! The promises that any KVM can show, with the null guest. One file per promise.

mod engine;
mod fork;
