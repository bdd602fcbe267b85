"""What can be run: preset files, the published settings read from `.env`, and the bundled demo model."""
