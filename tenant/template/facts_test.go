package template

import (
	"slices"
	"strings"
	"testing"
)

// goodFacts is a small OS that breaks no rule.
const goodFacts = `file d 755 0 0 etc
file f 755 0 0 usr/bin/true
file f 644 0 0 etc/machine-id
file l 777 0 0 usr/lib/systemd/system/sysinit.target.wants/systemd-journald.service
file l 777 0 0 etc/systemd/system/getty.target
link usr/lib/systemd/system/sysinit.target.wants/systemd-journald.service
target ../systemd-journald.service
link usr/lib/systemd/system/multi-user.target.wants/getty.target
target ../getty.target
link etc/systemd/system/getty.target
target /dev/null
sum 7f5b6fdb2e4f4bfbd8b6bd4bb1d8f16a80b6ac5b0f9b73fe03e3de6ad1fb9a2b usr/bin/true
passwd root:x:0:0:root:/root:/usr/sbin/nologin
passwd daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
shadow root:*
shadow daemon:!*
package base-files
status install ok installed
version 12.4
package gone
status deinstall ok config-files
version 1
`

func TestFactsAreRead(t *testing.T) {
	f, err := parseFacts([]byte(goodFacts))
	if err != nil {
		t.Fatal(err)
	}
	if bad := f.findings(); len(bad) != 0 {
		t.Errorf("findings: %v", bad)
	}
	c := f.contents()
	if !slices.Equal(c.Packages, []Package{{"base-files", "12.4"}}) {
		t.Errorf("packages %v", c.Packages)
	}
	if len(c.Users) != 2 || c.Users[1].Name != "root" || !c.Users[1].Locked {
		t.Errorf("users %v", c.Users)
	}
	if len(c.Programs) != 1 || c.Programs[0].Path != "/usr/bin/true" || c.Programs[0].Mode != 0o100755 {
		t.Errorf("programs %v", c.Programs)
	}
	if !slices.Equal(c.Units, []string{"sysinit.target → systemd-journald.service"}) {
		t.Errorf("units %v", c.Units)
	}
}

func TestEachRuleFinds(t *testing.T) {
	for name, tc := range map[string]struct{ add, remove, code string }{
		"set-user-ID":        {add: "file f 4755 0 0 usr/bin/su", code: FindPrivilege},
		"set-group-ID":       {add: "file f 2755 0 42 usr/bin/chage", code: FindPrivilege},
		"device":             {add: "file b 600 0 0 usr/disk", code: FindDevice},
		"writable":           {add: "file f 666 0 0 usr/lib/x", code: FindWritable},
		"private key":        {add: "privatekey etc/ssl/private/x.pem", code: FindPrivateKey},
		"host key":           {add: "file f 600 0 0 etc/ssh/ssh_host_ed25519_key", code: FindPrivateKey},
		"authorized keys":    {add: "file f 600 0 0 usr/share/authorized_keys", code: FindPrivateKey},
		"machine id":         {add: "machineid etc/machine-id", code: FindIdentity},
		"password":           {add: "shadow root:$y$j9T$abc", code: FindPassword},
		"empty password":     {add: "shadow root:", code: FindPassword},
		"password in passwd": {add: "passwd eve:hash:1000:1000::/:/usr/sbin/nologin\nshadow eve:*", code: FindPassword},
		"no shadow line":     {remove: "shadow daemon:!*\n", code: FindPassword},
		"shell":              {add: "passwd eve:x:1000:1000::/:/bin/bash\nshadow eve:*", code: FindPassword},
		"second root":        {add: "passwd eve:x:0:0::/:/usr/sbin/nologin\nshadow eve:*", code: FindPassword},
		"unit":               {add: "link etc/systemd/system/multi-user.target.wants/ssh.service\ntarget /lib/systemd/system/ssh.service", code: FindUnit},
		"unmasked":           {remove: "link etc/systemd/system/getty.target\ntarget /dev/null\n", code: FindUnit},
		"file in root":       {add: "file f 600 0 0 root/.netrc", code: FindForeign},
		"local program":      {add: "file f 755 0 0 usr/local/bin/x", code: FindForeign},
		"preload":            {add: "file f 644 0 0 etc/ld.so.preload", code: FindForeign},
	} {
		f, err := parseFacts([]byte(strings.Replace(goodFacts, tc.remove, "", 1) + tc.add + "\n"))
		if tc.add == "" {
			f, err = parseFacts([]byte(strings.Replace(goodFacts, tc.remove, "", 1)))
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !slices.ContainsFunc(f.findings(), func(found Finding) bool { return found.Code == tc.code }) {
			t.Errorf("%s: findings %v lack %s", name, f.findings(), tc.code)
		}
	}
}

func TestMalformedFactsAreRefused(t *testing.T) {
	for _, line := range []string{"file f 755 0 0", "file f 9 0 0 x", "file f 755 root 0 x", "sum abc x", "passwd root:x:0", "passwd a:x:b:0:::", "version 1", "surprise"} {
		if _, err := parseFacts([]byte(line + "\n")); err == nil {
			t.Errorf("%q is accepted", line)
		}
	}
}

func FuzzParseFacts(f *testing.F) {
	f.Add([]byte(goodFacts))
	f.Fuzz(func(t *testing.T, data []byte) {
		if facts, err := parseFacts(data); err == nil {
			facts.findings()
			facts.contents()
		}
	})
}
