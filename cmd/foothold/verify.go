package main

import (
	"bytes"
	"cmp"
	"crypto/ed25519"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"foothold/client/term"
	"foothold/protocol/digest"
	"foothold/protocol/platform"
	"foothold/tenant/verify"

	"github.com/spf13/cobra"
)

// maxEvidenceFiles bounds what one run reads.
const maxEvidenceFiles = 100000

type verifyFlags struct{ inventoryKey, platformKey, roots, profile, last string }

func verifyCommand() *cobra.Command {
	var f verifyFlags
	c := jsonFlag(&cobra.Command{
		Use:   "verify BUNDLE... --inventory-key HEX --platform-key HEX --tpm-roots FILE --profile PROFILE",
		Short: "Derive verdicts again from evidence bundles, with nothing but pinned keys",
		Long: `Derive verdicts again from the evidence bundles that ` + "`foothold vm evidence NAME --out FOLDER`" + `
exported, off line: no orchestrator is asked, and none is believed. Every check is made as
of when it was first made: signature of inventory and reference values by the keys that you
give, the host's keys back to the TPM manufacturers that you give, the quote, and all that
it was held against. A bundle counts only if that leads to exactly what it records.

Bundles of one start must also be one chain, from its boot on: each quote was made over the
verdict before. chain.json stands in for bundles that are not kept any more. --last holds
the newest verdict of the one start against the digest that ` + "`foothold vm show`" + ` or the journal told you: whoever
rewrites the newest bundle alone, with its digest, is found out by nothing else.

A refusal that came before there was a quote to judge - a nonce that had served, a host
that did not answer - has a bundle too, with what had come. What of it follows from that is
derived; what rests on somebody's word is listed as such, and is not proved.

A folder stands for the .json files in it. The exit code is 0 if all is as recorded and
accepted, 3 if all is as recorded and something was refused, and 1 if something is not as
recorded. Nothing gets permitted by this.`,
		Example: `  foothold verify evidence --profile production --tpm-roots tpm-roots.pem \
    --inventory-key 5f0c... --platform-key 91ab...`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			pinned, last, err := f.pinned()
			if err != nil {
				return err
			}
			files, err := evidenceFiles(args)
			if err != nil {
				return err
			}
			a, err := auditFiles(pinned, files, last)
			if err != nil {
				return err
			}
			if wantsJSON(cmd) {
				err = printJSON(cmd.OutOrStdout(), a)
			} else {
				a.show(term.New(cmd.OutOrStdout()))
			}
			return errors.Join(err, a.err())
		},
	})
	c.Flags().StringVar(&f.inventoryKey, "inventory-key", "", "the provider's public key, `HEX`")
	c.Flags().StringVar(&f.platformKey, "platform-key", "", "public key that signs reference values, `HEX`")
	c.Flags().StringVar(&f.roots, "tpm-roots", "", "PEM `FILE` of TPM manufacturers' authorities")
	c.Flags().StringVar(&f.profile, "profile", "", "`PROFILE` of the installation: "+platform.Production+" or "+platform.Lab)
	c.Flags().StringVar(&f.last, "last", "", "`DIGEST` that the newest verdict must have")
	for _, name := range []string{"inventory-key", "platform-key", "tpm-roots", "profile"} {
		c.MarkFlagRequired(name)
	}
	return c
}

// pinned reads what is believed. Nothing has a default.
func (f verifyFlags) pinned() (p verify.Pinned, last digest.SHA256, err error) {
	key := func(flag, text string) (out ed25519.PublicKey) {
		data, e := hex.DecodeString(text)
		if e != nil || len(data) != ed25519.PublicKeySize {
			err = errors.Join(err, fmt.Errorf("--%s: want an Ed25519 public key, 64 hexadecimal digits", flag))
		}
		return data
	}
	p = verify.Pinned{InventoryKey: key("inventory-key", f.inventoryKey), PlatformKey: key("platform-key", f.platformKey), Profile: f.profile, Now: time.Now}
	if f.profile != platform.Lab && f.profile != platform.Production {
		err = errors.Join(err, fmt.Errorf("--profile %q: want %s or %s", f.profile, platform.Production, platform.Lab))
	}
	var e error
	if p.Makers, e = verify.OpenManufacturers(f.roots); e != nil {
		err = errors.Join(err, fmt.Errorf("--tpm-roots: %w", e))
	}
	if f.last != "" {
		if last, e = digest.Parse(f.last); e != nil {
			err = errors.Join(err, errors.New("--last: want a verdict's digest, 64 hexadecimal digits"))
		}
	}
	if err != nil {
		err = usage("%w", err)
	}
	return p, last, err
}

// evidenceFiles lists the files that arguments stand for.
func evidenceFiles(args []string) (files []string, err error) {
	for _, arg := range args {
		info, err := os.Stat(arg)
		if err != nil {
			return nil, usage("%w", err)
		}
		if !info.IsDir() {
			files = append(files, arg)
			continue
		}
		inside, err := filepath.Glob(filepath.Join(arg, "*.json"))
		if err != nil || len(inside) == 0 {
			return nil, usage("folder %s holds no .json file", arg)
		}
		files = append(files, inside...)
	}
	if len(files) > maxEvidenceFiles {
		return nil, usage("%d files: at most %d are read at once", len(files), maxEvidenceFiles)
	}
	return files, nil
}

// auditReport is what `verify --json` prints.
type auditReport struct {
	Holds    bool                  `json:"holds"`    // all is as recorded
	Accepted bool                  `json:"accepted"` // and nothing was refused
	Bundles  []auditedFile         `json:"bundles"`
	Chains   []verify.AuditedChain `json:"chains"`
}

// auditedFile is one file; one that is no bundle has a problem alone.
type auditedFile struct {
	File    string          `json:"file"`
	Problem string          `json:"problem,omitempty"`
	Audited *verify.Audited `json:"audited,omitempty"`
}

func auditFiles(p verify.Pinned, files []string, last digest.SHA256) (auditReport, error) {
	a := auditReport{Holds: true, Accepted: true, Bundles: []auditedFile{}, Chains: []verify.AuditedChain{}}
	type startKey struct {
		reservation string
		start       int
	}
	bundles, links := map[startKey][]verify.Audited{}, map[startKey][]verify.Link{}
	several := map[startKey]bool{} // of each start: whether there is more of it than one bundle
	for _, file := range files {
		data, err := readEvidence(file)
		if err != nil {
			return a, err
		}
		if isChain(data) {
			c, err := verify.ParseChain(bytes.NewReader(data))
			if err != nil {
				a.Bundles, a.Holds = append(a.Bundles, auditedFile{File: file, Problem: err.Error()}), false
			}
			for _, l := range c.Links {
				k := startKey{l.Reservation, l.Start}
				links[k], several[k] = append(links[k], l), true
			}
			continue
		}
		b, err := verify.ParseBundle(data)
		if err != nil {
			a.Bundles, a.Holds = append(a.Bundles, auditedFile{File: file, Problem: err.Error()}), false
			continue
		}
		one, err := p.Audit(b)
		if err != nil {
			return a, err
		}
		a.Bundles = append(a.Bundles, auditedFile{File: file, Audited: &one})
		a.Holds, a.Accepted = a.Holds && one.Holds(), a.Accepted && one.Derived
		k := startKey{one.Reservation, one.Start}
		bundles[k] = append(bundles[k], one)
		several[k] = several[k] || len(bundles[k]) > 1
	}
	for k := range several {
		c := verify.AuditChain(bundles[k], links[k])
		if several[k] && !c.Complete && c.Holds() {
			c.Tests = append(c.Tests, verify.Test{Name: "complete", Says: fmt.Sprintf("it does not begin with a boot: verdict %s is not here", c.Missing)})
		}
		if !last.IsZero() {
			c.Tests = append(c.Tests, verify.Test{Name: "last", Holds: c.Last == last, Says: fmt.Sprintf("the newest verdict is %s, wanted is %s", c.Last, last)})
		}
		a.Holds = a.Holds && c.Holds()
		a.Chains = append(a.Chains, c)
	}
	slices.SortFunc(a.Chains, func(x, y verify.AuditedChain) int {
		return cmp.Or(cmp.Compare(x.Reservation, y.Reservation), cmp.Compare(x.Start, y.Start))
	})
	a.Holds = a.Holds && len(a.Chains) > 0
	a.Accepted = a.Holds && a.Accepted
	return a, nil
}

func readEvidence(file string) ([]byte, error) {
	f, _, err := openRegular(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, verify.MaxEvidenceFile+1))
	if err != nil {
		return nil, usage("read %s: %w", file, err)
	}
	return data, nil
}

// isChain tells a list of links from a bundle; either is read strictly afterwards.
func isChain(data []byte) bool {
	var head struct {
		Format string `json:"format"`
	}
	return json.Unmarshal(data, &head) == nil && head.Format == verify.ChainFormat
}

// err is how the command ends.
func (a auditReport) err() error {
	switch {
	case !a.Holds:
		return errors.New("the evidence is not what it says that it is; every check that failed is marked")
	case !a.Accepted:
		return &exitError{exitRefused, errors.New("the evidence is as recorded, and records a refusal")}
	}
	return nil
}

func (a auditReport) show(out *term.Out) {
	mark := func(ok bool) string {
		if ok {
			return out.Paint(term.Good, "✓")
		}
		return out.Paint(term.Bad, "✗")
	}
	tests := func(list []verify.Test) {
		for _, t := range list {
			out.Line("    %s %-10s %s", mark(t.Holds), t.Name, term.Clean(t.Says))
		}
	}
	for _, b := range a.Bundles {
		if b.Audited == nil {
			out.Line("%s %s: %s", mark(false), term.Clean(b.File), term.Clean(b.Problem))
			continue
		}
		x := b.Audited
		says := "not as recorded"
		if x.Holds() {
			says = map[bool]string{true: "accepted, rightly", false: "refused, rightly"}[x.Derived]
		}
		decided := "judged"
		if x.Cause != "" {
			decided = "not judged, refused"
			if x.Holds() {
				says = "as recorded, as far as keys show"
			}
		}
		out.Line("%s %s: %s quote of host %s for start %d of %s, %s %s: %s", mark(x.Holds()), term.Clean(b.File), term.Clean(x.Role), term.Clean(x.Host), x.Start,
			term.Clean(x.Reservation), decided, x.At.Format(time.RFC3339), says)
		if p := x.Policy; p != nil {
			out.Line("  by the tenant's policy for the host: %s", term.Clean(p.String()))
		}
		tests(x.Tests)
		for _, word := range x.Unproved {
			out.Line("    ? %-10s %s", "no key", term.Clean(word))
		}
		showFindings(out, x.Findings)
	}
	for _, c := range a.Chains {
		out.Line("%s start %d of %s: %s, evidence of %d, the newest is %s", mark(c.Holds()), c.Start, term.Clean(c.Reservation), plural(c.Verdicts, "verdict", "verdicts"), c.Bundles, c.Last)
		tests(c.Tests)
	}
}
