"""Model folders: found, downloaded, converted and checked; the shape of each known family."""
