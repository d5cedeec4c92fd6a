"""HTML reports: one file each, no network, no scripts. They need the extra `report`."""
