"""The console command: ``python -m lightning_lora``."""

from lightning_lora.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
