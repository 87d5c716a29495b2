"""Where a subject is: masks from attention maps, matches between features, and pictures of both."""
