"""The sweep engine: from a YAML spec to trials, a collapse report and exports."""
