"""The tests: single/ in one process, parallel/ under a launcher, cluster/ on a made-up cluster."""
