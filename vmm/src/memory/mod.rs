//! Guest-physical layout, the shared image and a fork's private view of it.
