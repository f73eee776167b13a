"""pilotbed: what no package gives for a pilot-job grid."""
