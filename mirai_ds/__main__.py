"""`python -m mirai_ds` is `mirai-ds`."""

from mirai_ds.cli.main import main

if __name__ == "__main__":
    main()
