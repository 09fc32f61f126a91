"""Many runs as one file: what varies, how often, what is measured at the end, and which claims that decides."""
