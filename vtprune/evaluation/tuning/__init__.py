"""The lowest keep whose answers survive: searched on some files, confirmed on others."""
