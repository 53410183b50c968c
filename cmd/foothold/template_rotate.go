package main

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"

	"foothold/client"
	"foothold/client/term"
	"foothold/internal/signingkey"
	"foothold/protocol/api"
	"foothold/tenant/template"

	"github.com/spf13/cobra"
)

func templateRotate() *cobra.Command {
	var f buildFlags
	c := jsonFlag(&cobra.Command{
		Use:   "rotate NAME",
		Short: "Make a template's next version: under a new key, and patched if you ask",
		Long: `Make the next version of a registered template: the same operating system, encrypted under
a new key, or with --patch bootstrapped from today's packages. Kernel and initramfs are
made and signed anew, the result is audited, registered and uploaded, as by a build.

VMs that run keep their version. Each takes the new one at its next start, with its
volume's data: foothold vm restart NAME. When nothing uses the old version any more, its
key is destroyed and its hosts delete its ciphertext, by themselves.

A rotation that broke off is finished by the same command.`,
		Example: `  foothold template rotate debian
  foothold template rotate debian --patch
  foothold template list                     # which version is current, which is still in use`,
		Args: cobra.ExactArgs(1),
		RunE: inSession(func(cmd *cobra.Command, args []string, s *session) error {
			return rotateTemplate(cmd, args[0], f, s)
		}),
	})
	c.Flags().BoolVar(&f.patch, "patch", false, "bootstrap today's packages")
	c.Flags().StringVar(&f.dir, "dir", "", "`FOLDER` that holds templates (default: the context's, else ~/.cache/foothold/templates)")
	c.Flags().StringVar(&f.cache, "cache", "", "`FOLDER` of packages and bootstraps (default: the context's, else ~/.cache/foothold/build)")
	c.Flags().StringVar(&f.guest, "guest", "", "foothold-guest `FILE` (default: the context's, else beside this program)")
	c.Flags().StringVar(&f.key, "component-key", "", "`FILE` of the organisation's component key (default: the context's)")
	return c
}

func rotateTemplate(cmd *cobra.Command, name string, f buildFlags, s *session) error {
	ctx := cmd.Context()
	context, err := findContext(cmd)
	if err != nil {
		return err
	}
	list, err := s.Templates(ctx)
	if err != nil {
		return err
	}
	var versions []api.Template
	for _, t := range list {
		if t.Name == name {
			versions = append(versions, t)
		}
	}
	if len(versions) == 0 {
		return usage("template %s is not registered; make it: foothold template build %s", name, name)
	}
	newest := versions[0]
	// VMs have volumes of this kind already.
	f.volume, f.rotate = volumeKind(newest), true
	if err := f.settle(context); err != nil {
		return err
	}
	key, err := signingkey.Read(f.key)
	if err != nil {
		return usage("%w", err)
	}
	t, err := nextVersion(cmd, s.log, name, f, key, versions)
	if err != nil {
		return err
	}
	registered, err := s.register(ctx, s.log, t, key.Public().(ed25519.PublicKey), true)
	if err != nil {
		return err
	}
	if wantsJSON(cmd) {
		registered.Boot, registered.Hosts = orEmpty(registered.Boot), orEmpty(registered.Hosts)
		return printJSON(cmd.OutOrStdout(), registered)
	}
	s.log.Line("template %s has version %d, sha256 %s", name, registered.Version, registered.SHA256.Short())
	if newest.Version != registered.Version && newest.VMs > 0 {
		s.log.Line("%s version %d until the next start: foothold vm restart VM", plural(newest.VMs, "VM keeps", "VMs keep"), newest.Version)
	}
	return nil
}

// nextVersion makes the next version in the template's folder. If what lies there was never
// registered, a rotation broke off behind it, and it is taken as it is.
func nextVersion(cmd *cobra.Command, log *term.Out, name string, f buildFlags, key ed25519.PrivateKey, versions []api.Template) (*template.Template, error) {
	local, err := template.Open(filepath.Join(f.dir, name))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, usage("%s is not on this machine in %s; rotate it where it was built, or say --dir FOLDER", name, f.dir)
	case err != nil:
		return nil, fmt.Errorf("rotate template: %w", err)
	}
	f.suite, f.packages = local.Suite, local.Extra
	unfinished := true
	for _, v := range versions {
		unfinished = unfinished && v.SHA256 != local.Ciphertext
	}
	// One that is registered and does not lie wherever an older one does is to be uploaded.
	if newest := versions[0]; newest.Version > 1 && newest.SHA256 == local.Ciphertext {
		for _, older := range versions[1:] {
			for _, host := range older.Hosts {
				unfinished = unfinished || !slices.Contains(newest.Hosts, host)
			}
		}
	}
	if unfinished && !f.patch && (local.AuthenticatedVolume == (f.volume == client.VolumeAuthenticated)) {
		log.Line("a rotation of %s broke off; it is finished now", name)
		f.rotate = false
	}
	return buildAndAudit(cmd.Context(), log, name, f, key)
}
