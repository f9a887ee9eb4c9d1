"""Dataset formats, one file each: a path becomes random-access samples with media left unopened."""
