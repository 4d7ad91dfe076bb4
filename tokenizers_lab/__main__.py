"""`python -m tokenizers_lab` is `toklab`, as `accelerate launch -m tokenizers_lab` needs it."""

from tokenizers_lab.cli.main import main

if __name__ == "__main__":
    main()
