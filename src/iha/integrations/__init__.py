"""IHA in engines that the library does not depend on; each imports its engine when it is used."""
