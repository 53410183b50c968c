package ruleset

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/google/nftables"
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

// Shut keeps the namespace's kernel from routing as long as no table of ours stands in its
// way, whatever the machine's own settings were. Where a former process left its table,
// which drops what it does not name, that stays in charge: what was admitted goes on while
// a daemon starts again. Call it first: a daemon that fails to start leaves it so.
func Shut() error {
	stands, err := stands()
	if err != nil || stands {
		return err
	}
	for _, path := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		err := os.WriteFile(filepath.Join(Sysctls, path), []byte("0"), 0o644)
		if err != nil && !(path[:4] == "ipv6" && errors.Is(err, fs.ErrNotExist)) {
			return fmt.Errorf("turn off forwarding: %w", err)
		}
	}
	return nil
}

// stands reports whether the namespace has our chain in the way of forwarded packets. A
// table comes and goes in one transaction, so it has the rules of some document.
func stands() (bool, error) {
	conn, err := nftables.New()
	if err != nil {
		return false, fmt.Errorf("open nftables: %w", err)
	}
	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, fmt.Errorf("list chains: %w", err)
	}
	return slices.ContainsFunc(chains, func(c *nftables.Chain) bool {
		return c.Table.Name == tableName && c.Name == chainForward && c.Hooknum != nil && *c.Hooknum == *nftables.ChainHookForward &&
			c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop
	}), nil
}

// Forward lets the namespace's kernel route. Call it when the table stands.
func Forward() error {
	if err := os.WriteFile(filepath.Join(Sysctls, "ipv4/ip_forward"), []byte("1"), 0o644); err != nil {
		return fmt.Errorf("turn on forwarding: %w", err)
	}
	return nil
}
