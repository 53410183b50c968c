package main

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"foothold/client"
	"foothold/client/term"
	"foothold/internal/signingkey"
	"foothold/protocol/api"
	"foothold/protocol/digest"
	"foothold/tenant/template"

	"github.com/spf13/cobra"
)

// buildFlags are the flags of `template build`, and where the context says otherwise.
type buildFlags struct {
	dir, cache, guest, key, suite string
	volume                        string
	packages                      []string
	rotate, patch                 bool
	local                         bool
}

func templateBuild() *cobra.Command {
	var f buildFlags
	c := jsonFlag(&cobra.Command{
		Use:   "build NAME",
		Short: "Build, audit, register and upload a template",
		Long: `Build a template on this machine, without root: bootstrap Debian, seal it block by block,
encrypt it under a new key, make the kernel and initramfs that VMs boot, sign them with
the organisation's component key, and audit the result. Then upload kernel and initramfs
to the store, register the template, and upload its ciphertext for the hosts.

What has not changed since the last build is kept, so a second build takes seconds.`,
		Example: `  foothold template build debian
  foothold template build tools --package curl --package jq
  foothold template build small --volume encrypted
  foothold template build debian --local      # build and audit; register nothing`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return buildTemplate(cmd, args[0], f) },
	})
	c.Flags().StringVar(&f.dir, "dir", "", "`FOLDER` that holds templates (default: the context's, else ~/.cache/foothold/templates)")
	c.Flags().StringVar(&f.cache, "cache", "", "`FOLDER` of packages and bootstraps (default: the context's, else ~/.cache/foothold/build)")
	c.Flags().StringVar(&f.guest, "guest", "", "foothold-guest `FILE` (default: the context's, else beside this program)")
	c.Flags().StringVar(&f.key, "component-key", "", "`FILE` of the organisation's component key (default: the context's)")
	c.Flags().StringVar(&f.suite, "suite", "", "Debian `SUITE` (default bookworm)")
	c.Flags().StringArrayVar(&f.packages, "package", nil, "`NAME` of a further package; may be given again")
	c.Flags().StringVar(&f.volume, "volume", "", "`KIND` of the VMs' own volumes: authenticated (a tag beside each sector shows that it\nwas altered), or encrypted alone (default: the context's, else authenticated)")
	c.Flags().BoolVar(&f.local, "local", false, "build and audit, but register nothing")
	return c
}

// settle fills what no flag said from the context, then from the defaults.
func (f *buildFlags) settle(c client.Context) error {
	cache, err := os.UserCacheDir()
	if err != nil {
		return usage("%w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find own program: %w", err)
	}
	for _, v := range []struct {
		value                 *string
		fromContext, fallback string
	}{
		{&f.dir, c.Templates, filepath.Join(cache, "foothold", "templates")},
		{&f.cache, c.Cache, filepath.Join(cache, "foothold", "build")},
		{&f.guest, c.Guest, filepath.Join(filepath.Dir(self), "foothold-guest")},
		{&f.key, c.ComponentKey, ""},
		{&f.volume, c.Volume, client.VolumeAuthenticated},
	} {
		if *v.value == "" {
			*v.value = v.fromContext
		}
		if *v.value == "" {
			*v.value = v.fallback
		}
	}
	if f.volume != client.VolumeAuthenticated && f.volume != client.VolumeEncrypted {
		return usage("--volume: want %s or %s", client.VolumeAuthenticated, client.VolumeEncrypted)
	}
	if f.key == "" {
		return usage("the context names no component key; say --component-key FILE")
	}
	return nil
}

func buildTemplate(cmd *cobra.Command, name string, f buildFlags) error {
	c, err := findContext(cmd)
	if err != nil && !(f.local && f.key != "") {
		return err
	}
	if err := f.settle(c); err != nil {
		return err
	}
	key, err := signingkey.Read(f.key)
	if err != nil {
		return usage("%w", err)
	}
	log := term.New(cmd.ErrOrStderr())
	t, err := buildAndAudit(cmd.Context(), log, name, f, key)
	if err != nil {
		return err
	}
	if f.local {
		return showBuilt(cmd, log, "built and audited in "+t.Dir(), api.Template{Name: t.Name, SHA256: t.Ciphertext, Size: t.Size, Created: t.Created, Release: t.Components.Release,
			AuthenticatedVolume: t.AuthenticatedVolume})
	}
	s, err := open(cmd)
	if err != nil {
		return err
	}
	registered, err := s.register(cmd.Context(), log, t, key.Public().(ed25519.PublicKey), false)
	if err != nil {
		return err
	}
	return showBuilt(cmd, log, "registered", registered)
}

func showBuilt(cmd *cobra.Command, log *term.Out, what string, t api.Template) error {
	if wantsJSON(cmd) {
		t.Boot, t.Hosts = orEmpty(t.Boot), orEmpty(t.Hosts)
		return printJSON(cmd.OutOrStdout(), t)
	}
	log.Line("template %s, %s, sha256 %s, volumes %s, is %s", t.Name, bytesText(t.Size), t.SHA256.Short(), volumeKind(t), what)
	return nil
}

func volumeKind(t api.Template) string {
	if t.AuthenticatedVolume {
		return client.VolumeAuthenticated
	}
	return client.VolumeEncrypted
}

// buildAndAudit shows each step of the build, and refuses what does not pass its audit.
func buildAndAudit(ctx context.Context, log *term.Out, name string, f buildFlags, key ed25519.PrivateKey) (*template.Template, error) {
	p := newStepLog(log)
	defer p.close()
	t, err := template.Build(ctx, template.Options{
		Dir: filepath.Join(f.dir, name), Name: name, CacheDir: f.cache, Init: f.guest,
		ComponentKey: key, Suite: f.suite, Packages: f.packages, AuthenticatedVolume: f.volume == client.VolumeAuthenticated,
		Rotate: f.rotate, Patch: f.patch, Progress: p.begin,
	})
	if err != nil {
		return nil, err
	}
	report, err := template.Audit(ctx, t.Dir(), key.Public().(ed25519.PublicKey), p.begin)
	if err != nil {
		return nil, err
	}
	if !report.Passed() {
		return nil, &auditError{t.Name, report.Findings}
	}
	p.done()
	return t, nil
}

// auditError is a template that did not pass.
type auditError struct {
	name     string
	findings []template.Finding
}

func (e *auditError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "template %s does not pass its audit:", e.name)
	for _, f := range e.findings {
		fmt.Fprintf(&b, "\n  - %s", term.Clean(f.String()))
	}
	return b.String()
}

// register uploads what a template needs, in the order that a crash can be repeated
// from: objects, record, ciphertext.
func (s *session) register(ctx context.Context, log *term.Out, t *template.Template, key ed25519.PublicKey, rotate bool) (api.Template, error) {
	list, err := s.Templates(ctx)
	if err != nil {
		return api.Template{}, err
	}
	hosts, err := s.Hosts(ctx)
	if err != nil {
		return api.Template{}, err
	}
	req, err := registration(t, key)
	if err != nil {
		return api.Template{}, err
	}
	defer req.VolumeKey.Wipe()
	req.Rotate = rotate
	p := newStepLog(log)
	defer p.close()
	for _, old := range list {
		if old.Name == t.Name && old.SHA256 == t.Ciphertext && old.Release == t.Components.Release && liesEverywhere(old, hosts) && !rotate {
			p.begin("registering") // changes nothing, unless expectations or signature are others
			registered, err := s.RegisterTemplate(ctx, req)
			if err == nil {
				p.done()
				log.Line("%s lies at its hosts already, nothing was uploaded", t.Name)
			}
			return registered, err
		}
	}
	for _, o := range []struct {
		what, path string
		sum        digest.SHA256
	}{
		{"uploading the kernel", t.Kernel(), t.Components.Kernel.SHA256},
		{"uploading the initramfs", t.Initramfs(), t.Components.Initramfs.SHA256},
	} {
		p.begin(o.what)
		if err := uploadFile(o.path, func(f *os.File, size int64) error { return s.PutObject(ctx, o.sum, f, size) }); err != nil {
			return api.Template{}, fmt.Errorf("%s: %w", o.what, err)
		}
	}
	p.begin("registering")
	registered, err := s.RegisterTemplate(ctx, req)
	if err != nil {
		return api.Template{}, err
	}
	p.begin("uploading the ciphertext")
	if err := uploadFile(t.Image(), func(f *os.File, size int64) error { return s.PutImage(ctx, t.Name, f, size) }); err != nil {
		return api.Template{}, fmt.Errorf("upload the ciphertext: %w", err)
	}
	p.done()
	return registered, nil
}

// liesEverywhere reports whether a template lies at every host in good standing: one that
// is new in the inventory has it when its build is repeated.
func liesEverywhere(t api.Template, hosts []api.Host) bool {
	for _, h := range hosts {
		if h.Standing == "good" && !slices.Contains(t.Hosts, h.Name) {
			return false
		}
	}
	return len(t.Hosts) > 0
}

// registration is what the orchestrator gets to know of a template.
func registration(t *template.Template, key ed25519.PublicKey) (api.RegisterTemplate, error) {
	var req api.RegisterTemplate
	components, err := t.SignedComponents(key)
	if err != nil {
		return req, err
	}
	volume, err := t.VolumeKey()
	if err != nil {
		return req, err
	}
	expectations, err := t.Expectations()
	if err != nil {
		return req, err
	}
	audit, err := expectations.Encode()
	if err != nil {
		return req, err
	}
	return api.RegisterTemplate{
		Name: t.Name, SHA256: t.Ciphertext, Size: t.Size, RootHash: t.RootHash, HashOffset: t.HashOffset,
		VolumeKey: volume, Components: components, Audit: audit, Created: t.Created,
	}, nil
}

func uploadFile(path string, put func(*os.File, int64) error) error {
	f, size, err := openRegular(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return put(f, size)
}

func templateAudit() *cobra.Command {
	var dir, keyFile string
	c := jsonFlag(&cobra.Command{
		Use:   "audit NAME|FOLDER",
		Short: "Check a built template without running it",
		Long: `Check a built template without running it: digests, the organisation's signature, every
block against the root hash, and what must not be in it - private keys, passwords,
set-user-ID programs, units that start and should not, files of no package.`,
		Example: "  foothold template audit debian\n  foothold template audit ./build/templates/debian --json",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			f := buildFlags{dir: dir, key: keyFile}
			c, err := findContext(cmd)
			if err != nil && keyFile == "" {
				return err
			}
			if err := f.settle(c); err != nil {
				return err
			}
			key, err := signingkey.Read(f.key)
			if err != nil {
				return usage("%w", err)
			}
			folder := args[0]
			if !strings.Contains(folder, "/") {
				folder = filepath.Join(f.dir, folder)
			}
			return auditTemplate(cmd, folder, key.Public().(ed25519.PublicKey))
		},
	})
	c.Flags().StringVar(&dir, "dir", "", "`FOLDER` that holds templates (default: the context's)")
	c.Flags().StringVar(&keyFile, "component-key", "", "`FILE` of the organisation's component key (default: the context's)")
	return c
}

func auditTemplate(cmd *cobra.Command, folder string, key ed25519.PublicKey) error {
	log := term.New(cmd.ErrOrStderr())
	p := newStepLog(log)
	report, err := template.Audit(cmd.Context(), folder, key, p.begin)
	if errors.Is(err, os.ErrNotExist) {
		p.close()
		return usage("%w", err)
	}
	if err != nil {
		p.close()
		return err
	}
	p.done()
	p.close()
	if wantsJSON(cmd) {
		report.Findings = orEmpty(report.Findings)
		if err := json.NewEncoder(cmd.OutOrStdout()).Encode(report); err != nil {
			return err
		}
	}
	if !report.Passed() {
		return &auditError{report.Template.Name, report.Findings}
	}
	if !wantsJSON(cmd) {
		log.Line("template %s passes: nothing was found", report.Template.Name)
	}
	return nil
}

// stepLog turns "now doing this" into steps with durations.
type stepLog struct {
	steps *term.Steps
	name  string
	began time.Time
}

func newStepLog(out *term.Out) *stepLog { return &stepLog{steps: out.Steps()} }

// begin ends the step before.
func (l *stepLog) begin(name string) {
	l.done()
	l.name, l.began = name, time.Now()
	l.steps.Begin(name, l.began)
}

func (l *stepLog) done() {
	if l.name != "" {
		l.steps.End(l.name, time.Since(l.began))
	}
	l.name = ""
}

// close ends the display; a step that is still open has failed.
func (l *stepLog) close() {
	if l.name != "" {
		l.steps.Fail(l.name, time.Since(l.began))
	}
	l.steps.Close()
}
