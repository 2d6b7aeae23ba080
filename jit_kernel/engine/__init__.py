"""From a kernel's source to a loaded artifact. It knows no kernel."""
