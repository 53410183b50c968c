// Package docs holds no code. Its tests keep the documentation true: errors.md is made
// from protocol/event's table (go test ./docs -update), links lead somewhere, and every
// package and test that a page names exists.
package docs
