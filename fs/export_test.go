package fs

// ViewTime is for tests outside of the package.
const ViewTime = viewTime
