"""`python -m convert --source=ORIGINAL --target=CONVERTED`: weights in original names to the library's."""

from absl import flags

from convert.folder import convert_folder
from ditmem_jax import cli

SOURCE = flags.DEFINE_string("source", None, "Folder of the original files.", required=True)
TARGET = flags.DEFINE_string("target", None, "Folder to make.", required=True)


def main() -> None:
    convert_folder(SOURCE.value, TARGET.value)
    print(f"{TARGET.value} is ready")


if __name__ == "__main__":
    cli.run(main)
