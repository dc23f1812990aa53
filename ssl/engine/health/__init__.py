"""Lost ranks and bad steps."""
