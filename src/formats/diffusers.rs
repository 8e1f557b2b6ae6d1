//! diffusers
