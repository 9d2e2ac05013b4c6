"""`python -m mobile_vla_inference`: the command line without an installed executable."""

from mobile_vla_inference.tools.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
