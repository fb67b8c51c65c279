//! The promises that any KVM can show, with the null guest. One file per promise.

mod admission;
mod bad_input;
mod crash;
mod damage;
mod embryo;
mod engine;
mod fork;
mod isolation;
mod leaks;
mod limits;
mod memory;
mod pager;
mod pool;
mod ports;
mod residency;
mod slow_disk;
mod streamed;
mod teardown;
