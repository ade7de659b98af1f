"""Print requirements.lock: every installed distribution but Phalanx itself, one exact pin a line, sorted by name."""

from importlib.metadata import distributions

NOT_PINNED = {"phalanx", "pip", "setuptools"}


def main() -> None:
    pins = {}
    for distribution in distributions():
        name = distribution.metadata["Name"].lower().replace("_", "-")
        pins[name] = distribution.version.split("+")[0]
    print(
        "# Exact versions of everything in .venv, made by `make lock`. pip reads it: pip install -r requirements.lock"
    )
    for name in sorted(pins.keys() - NOT_PINNED):
        print(f"{name}=={pins[name]}")


if __name__ == "__main__":
    main()
