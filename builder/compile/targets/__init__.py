"""The compilers: `base` is what each offers, `choice` opens one."""
