package ruleset

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Sysctls is the folder of the settings that Harden and Forward make.
const Sysctls = "/proc/sys/net"

// Harden makes the namespace's kernel refuse what no table needs: packets whose source
// would be answered by another interface, redirects, source routes, IPv6.
func Harden() error {
	for _, s := range []struct{ path, value string }{
		{"ipv4/conf/all/rp_filter", "1"},
		{"ipv4/conf/default/rp_filter", "1"},
		{"ipv4/conf/all/accept_redirects", "0"},
		{"ipv4/conf/all/send_redirects", "0"},
		{"ipv4/conf/default/send_redirects", "0"},
		{"ipv4/conf/all/accept_source_route", "0"},
		{"ipv6/conf/all/disable_ipv6", "1"},
		{"ipv6/conf/default/disable_ipv6", "1"},
	} {
		err := os.WriteFile(filepath.Join(Sysctls, s.path), []byte(s.value), 0o644)
		if err != nil && !(s.path[:4] == "ipv6" && errors.Is(err, fs.ErrNotExist)) {
			return fmt.Errorf("harden: %w", err)
		}
	}
	return noRedirects()
}

// noRedirects covers interfaces that exist already: for redirects the kernel takes
// "all" or the interface's own value, whichever is set.
func noRedirects() error {
	files, err := filepath.Glob(filepath.Join(Sysctls, "ipv4/conf/*/send_redirects"))
	if err != nil {
		return fmt.Errorf("harden: %w", err)
	}
	for _, f := range files {
		if err := os.WriteFile(f, []byte("0"), 0o644); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("harden: %w", err)
		}
	}
	return nil
}

// Forward lets the namespace's kernel route. Call it when the table stands.
func Forward() error {
	if err := os.WriteFile(filepath.Join(Sysctls, "ipv4/ip_forward"), []byte("1"), 0o644); err != nil {
		return fmt.Errorf("turn on forwarding: %w", err)
	}
	return nil
}
