"""`python -m hf_paged`: the same as the command `hf-paged`."""

from hf_paged.integrations.cli import main

if __name__ == "__main__":
    main()
