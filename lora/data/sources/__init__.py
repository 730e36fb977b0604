"""Where rows come from: files, directories with parts, data sets of the hub."""
