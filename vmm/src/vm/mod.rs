//! The KVM virtual machine in the one cheap order.
